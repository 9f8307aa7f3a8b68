"""Libraries that turn constraints into masks: one module each, all behind `base.Backend`."""
