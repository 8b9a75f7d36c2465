"""What the server watches in live data: drift, quality and contract violations, from the windows that devices send."""
