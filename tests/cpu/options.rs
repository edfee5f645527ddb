//! What changes scores, hides single pairs, and lengths.
