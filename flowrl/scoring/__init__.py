"""The reward runtime: adapting plain functions (``adapt``), running rewards (``runtime``), trying one out
(``probe``)."""
