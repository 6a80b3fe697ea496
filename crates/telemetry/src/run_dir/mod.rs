//! The run directory and its files; every file is complete or absent.

pub(crate) mod atomic;
pub(crate) mod descriptors;
pub(crate) mod directory;
pub(crate) mod files;
pub(crate) mod journal;
pub(crate) mod lines;
pub(crate) mod private;
pub(crate) mod samples;
pub(crate) mod tensorboard;
