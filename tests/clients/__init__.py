"""Clients other than Bazel: real ones where they can be installed, and fakes of those that cannot."""
