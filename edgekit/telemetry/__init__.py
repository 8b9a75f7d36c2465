"""Topics, codecs and histograms of the device's messages."""
