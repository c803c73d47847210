"""What prefill and decode workers share: settings, the engine's life, when a request did what."""
