"""Measurements that the README quotes; each module prints one Markdown table."""

import emloc  # noqa: F401  # before torch: it settles how much memory threads keep
