"""The whole stack on one machine: what make run starts, follows, shows and stops."""
