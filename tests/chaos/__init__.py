"""Real processes under mixed load while they are killed, paused, restarted and cut off."""
