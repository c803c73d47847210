"""Many short requests, and whether what the services hold stays flat."""
