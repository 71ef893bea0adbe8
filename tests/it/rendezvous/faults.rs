//! What becomes of a shared store when its server fails.
