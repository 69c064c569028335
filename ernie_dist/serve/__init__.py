"""A model to talk to: in the console, on a page in the browser, over an OpenAI-compatible API."""
