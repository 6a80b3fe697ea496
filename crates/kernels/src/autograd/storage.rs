//! Access to the storage of `f32` CPU tensors, for the fused operations.

use std::cell::Cell;
use std::ops::{Deref, Range};

use candle_core::{
    CpuStorage, DType, InplaceOp1, Layout, Result, Shape, Storage, StorageRef, Tensor, bail,
};

/// Whether all of `tensors` are `f32` on the CPU, as the fused operations require.
pub(crate) fn fusible(tensors: &[&Tensor]) -> bool {
    tensors
        .iter()
        .all(|tensor| tensor.device().is_cpu() && tensor.dtype() == DType::F32)
}

/// Dtype of sums over a tensor of this dtype: half precision is widened to `f32`.
pub fn accumulation_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    }
}

/// Read guard over the values of a contiguous `f32` CPU tensor.
pub struct F32Guard<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl Deref for F32Guard<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => unreachable!("the dtype was checked when the storage was locked"),
        }
    }
}

/// Locks `tensor` for reading; fails if it is not contiguous, not `f32` or not on the CPU.
pub(crate) fn read_f32(tensor: &Tensor) -> Result<F32Guard<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let range = match &*storage {
        Storage::Cpu(cpu) => {
            cpu.as_slice::<f32>()?;
            contiguous(layout)?
        }
        _ => bail!("fused operation on a tensor that is not on the CPU"),
    };
    Ok(F32Guard { storage, range })
}

/// Contiguous `f32` CPU tensor that does not change. Shares the storage of a tensor that already is one.
pub struct CpuTensor(Tensor);

impl CpuTensor {
    /// The values of `tensor`, copied if it is a variable, of another dtype or not contiguous.
    ///
    /// # Errors
    /// When it is not on the CPU.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let tensor = match tensor.is_variable() {
            true => tensor.copy()?,
            false => tensor.clone(),
        };
        let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
        read_f32(&tensor)?;
        Ok(Self(tensor))
    }

    /// The values in row-major order.
    pub fn values(&self) -> F32Guard<'_> {
        match read_f32(&self.0) {
            Ok(values) => values,
            Err(_) => unreachable!("the constructor has read the same tensor"),
        }
    }
}

/// The values of one argument of a custom operation, in row-major order.
pub(crate) fn argument<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    Ok(&storage.as_slice::<f32>()?[contiguous(layout)?])
}

/// Address of the storage of `tensor`: equal for tensors that share it.
pub(crate) fn address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref::<Storage>(&storage).addr()
}

/// The result of a custom operation.
pub(crate) fn result(values: Vec<f32>, shape: &Shape) -> (CpuStorage, Shape) {
    (CpuStorage::F32(values), shape.clone())
}

/// Lets `work` change the values of `tensor` in place.
pub(crate) fn update_in_place(
    tensor: &Tensor,
    work: impl FnOnce(&mut [f32]) -> Result<()>,
) -> Result<()> {
    tensor.inplace_op1(&InPlaceUpdate(Cell::new(Some(work))))
}

struct InPlaceUpdate<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for InPlaceUpdate<F> {
    fn name(&self) -> &'static str {
        "update-in-place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let range = contiguous(layout)?;
        let CpuStorage::F32(values) = storage else {
            bail!("in-place operation on a tensor that is not f32");
        };
        match self.0.take() {
            Some(work) => work(&mut values[range]),
            None => bail!("in-place operation run twice"),
        }
    }
}

fn contiguous(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("fused operation on a tensor that is not contiguous: call contiguous()"),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn reading_honours_offsets_and_rejects_strides() -> Result<()> {
        let tensor = Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((3, 2))?;
        assert_eq!(&*read_f32(&tensor.narrow(0, 1, 1)?)?, &[2., 3.]);
        assert!(read_f32(&tensor.t()?).is_err());
        assert!(read_f32(&tensor.to_dtype(DType::F64)?).is_err());
        Ok(())
    }

    #[test]
    fn cpu_tensor_copies_variables_and_other_dtypes_only() -> Result<()> {
        let tensor = Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((3, 2))?;
        let shared = CpuTensor::of(&tensor)?;
        assert_eq!(address(&shared.0), address(&tensor));
        let variable = candle_core::Var::from_tensor(&tensor)?;
        let copied = CpuTensor::of(&variable)?;
        variable.set(&tensor.zeros_like()?)?;
        assert_eq!(&*copied.values(), &[0., 1., 2., 3., 4., 5.]);
        let half = CpuTensor::of(&tensor.to_dtype(DType::BF16)?.t()?)?;
        assert_eq!(&*half.values(), &[0., 2., 4., 1., 3., 5.]);
        Ok(())
    }

    #[test]
    fn update_in_place_changes_the_values() -> Result<()> {
        let tensor = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
        update_in_place(&tensor, |values| {
            values[1] = 7.;
            Ok(())
        })?;
        assert_eq!(tensor.to_vec1::<f32>()?, [0., 7., 0.]);
        Ok(())
    }
}
