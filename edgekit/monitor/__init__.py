"""Pure statistics of live data: sketches on the device, comparison on the server."""
