"""The study of mixers: runs that differ in the attention alone, and what comes out of them. See docs/study.md."""
