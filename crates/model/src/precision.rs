//! Conversion of precision settings to kernel precisions.

use kernels::Precision;
use settings::{DtypeSetting, PrecisionSetting};

/// Matmul precision for sampling.
#[must_use]
pub fn sampling_precision(setting: PrecisionSetting) -> Precision {
    match setting {
        PrecisionSetting::F32 => Precision::F32,
        PrecisionSetting::Bf16 => Precision::Bf16,
        PrecisionSetting::Int8 => Precision::Int8,
    }
}

/// Matmul precision for forward and backward passes.
#[must_use]
pub fn training_precision(setting: DtypeSetting) -> Precision {
    match setting {
        DtypeSetting::F32 => Precision::F32,
        DtypeSetting::Bf16 => Precision::Bf16,
    }
}
