"""Work orders: what the fleet server decided and only somebody with keys can do."""
