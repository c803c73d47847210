"""The gateway: HTTP and gRPC in front, sessions with decode workers behind. Imports no torch."""
