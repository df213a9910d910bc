"""The advantage engine inside other trainers: ``trl`` and ``verl``. Importing this imports neither."""
