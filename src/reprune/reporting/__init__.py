"""From run folders to tables and plots."""
