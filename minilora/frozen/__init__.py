"""A weight that never changes, behind `x Wᵀ`, `dy W` and W itself; one file a way of holding it."""
