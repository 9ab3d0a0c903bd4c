"""Code that writes generated parts of the pages."""
