"""The HTTP server: OpenAI's form of image generation, with adapters, over the engine of this machine or of several."""
