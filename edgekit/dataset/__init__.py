"""Load and check calibration and evaluation data; infer the input contract."""
