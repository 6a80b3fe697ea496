//! Additions to candle's autograd: in-place gradient accumulation, and access to a tensor's storage.

pub(crate) mod gradients;
pub(crate) mod storage;
