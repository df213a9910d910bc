"""Reward families, one module each. Packaged as ``flowrl.rewards``; reach them through the registry."""

if __name__ != "flowrl.rewards":
    raise ImportError("import flowrl.rewards, not the bare folder 'rewards': the wheel owns the one name flowrl")
