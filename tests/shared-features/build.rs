//! Makes cargo resolve the build dependencies, whose features procedural macros share.
fn main() {}
