"""An adapted model: which modules are adapted, how, and what trains in it."""
