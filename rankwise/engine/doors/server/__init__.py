"""The HTTP door: an OpenAI-compatible server over the engine."""
