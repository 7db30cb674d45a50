"""Everything that knows a model's architecture, files or device."""
