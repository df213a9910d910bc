"""Adapters: one file a model family, over diffusers. Packaged as ``flowrl.pipelines``; reach them through the registry."""

if __name__ != "flowrl.pipelines":
    raise ImportError("import flowrl.pipelines, not the bare folder 'pipelines': the wheel owns the one name flowrl")
