//! The weight of a linear layer or of a head: a tensor, or frozen and packed.

use candle_core::{Device, Result, Tensor, bail};

use crate::matmul::{PackedMatrix, Precision};

/// A weight `[out, in]` of products with rows of `in` values.
#[derive(Clone, Debug)]
pub enum WeightMatrix {
    /// Packed for every product. May be trained.
    Tensor(Tensor),
    /// Frozen, and packed once in the precision of its products: there is no other copy.
    Packed(PackedMatrix),
}

impl WeightMatrix {
    /// `[out, in]`.
    ///
    /// # Errors
    /// If a tensor has another number of dimensions.
    pub fn dims(&self) -> Result<[usize; 2]> {
        match self {
            Self::Tensor(tensor) => Ok(tensor.dims2()?.into()),
            Self::Packed(packed) => Ok(packed.weight_dims()),
        }
    }

    /// The tensor of a weight that is not packed.
    #[must_use]
    pub fn tensor(&self) -> Option<&Tensor> {
        match self {
            Self::Tensor(tensor) => Some(tensor),
            Self::Packed(_) => None,
        }
    }

    /// The values, unpacked if need be, as they were rounded.
    ///
    /// # Errors
    /// If candle cannot make a tensor of them.
    pub fn to_tensor(&self) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => Ok(tensor.clone()),
            Self::Packed(packed) => {
                let (values, dims) = (packed.unpacked(), packed.weight_dims());
                Tensor::from_vec(values, dims.as_slice(), &Device::Cpu)
            }
        }
    }

    /// Whether both are the same memory, not equal values.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tensor(a), Self::Tensor(b)) => a.id() == b.id(),
            (Self::Packed(a), Self::Packed(b)) => a.is_same(b),
            _ => false,
        }
    }

    /// Checks that a packed weight of the operation `name` has these dimensions and is packed in this precision.
    pub(crate) fn check_packed(
        &self,
        name: &str,
        dims: [usize; 2],
        precision: Precision,
    ) -> Result<()> {
        match self {
            Self::Packed(packed) if !packed.fits(dims, precision) => {
                bail!("{name} has {packed:?}, expected {dims:?} in {precision:?}")
            }
            _ => Ok(()),
        }
    }
}

impl From<&Tensor> for WeightMatrix {
    fn from(tensor: &Tensor) -> Self {
        Self::Tensor(tensor.clone())
    }
}

impl From<Tensor> for WeightMatrix {
    fn from(tensor: Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl From<&WeightMatrix> for WeightMatrix {
    fn from(weight: &WeightMatrix) -> Self {
        weight.clone()
    }
}

impl From<&PackedMatrix> for WeightMatrix {
    fn from(packed: &PackedMatrix) -> Self {
        Self::Packed(packed.clone())
    }
}
