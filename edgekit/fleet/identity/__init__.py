"""Who belongs to the fleet: its certificate authorities, claims, certificates and their revocation."""
