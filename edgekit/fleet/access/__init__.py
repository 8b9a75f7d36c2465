"""Who may see and change the fleet: accounts, sessions, tokens, roles."""
