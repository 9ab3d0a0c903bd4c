"""What a model version says of itself, what data may show a model, and how long values are kept."""
