//! How the fused operations reach a tensor's numbers, and which tensors they may reach.

use std::cell::Cell;
use std::ops::{Deref, Range};

use candle_core::{
    CpuStorage, DType, InplaceOp1, Layout, Result, Shape, Storage, StorageRef, Tensor, bail,
};

/// Whether all of `tensors` are `f32` on the CPU, and so within reach of a fused operation.
pub(super) fn fusible(tensors: &[&Tensor]) -> bool {
    tensors
        .iter()
        .all(|tensor| tensor.device().is_cpu() && tensor.dtype() == DType::F32)
}

/// The type in which sums over a tensor of this type are taken: half precision is widened.
pub(crate) fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    }
}

/// The numbers of a contiguous `f32` tensor on the CPU, read under its lock.
pub(crate) struct Floats<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl Deref for Floats<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(numbers)) => &numbers[self.range.clone()],
            _ => unreachable!("the storage was looked at when it was locked"),
        }
    }
}

/// Reads `tensor`; an error if it is not contiguous, not `f32` or not on the CPU.
pub(super) fn floats(tensor: &Tensor) -> Result<Floats<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let range = match &*storage {
        Storage::Cpu(cpu) => {
            cpu.as_slice::<f32>()?;
            contiguous(layout)?
        }
        _ => bail!("fused operation on a tensor that is not on the cpu"),
    };
    Ok(Floats { storage, range })
}

/// A tensor's numbers, contiguous and `f32`, that nothing changes any more: not copied where they are so already.
pub(crate) struct Fixed(Tensor);

impl Fixed {
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let tensor = match tensor.is_variable() {
            true => tensor.copy()?,
            false => tensor.clone(),
        };
        let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
        floats(&tensor)?;
        Ok(Self(tensor))
    }

    pub fn numbers(&self) -> Floats<'_> {
        match floats(&self.0) {
            Ok(numbers) => numbers,
            Err(_) => unreachable!("they were read when it was made"),
        }
    }
}

/// The numbers behind one argument of a custom operation, in row-major order.
pub(super) fn argument<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    Ok(&storage.as_slice::<f32>()?[contiguous(layout)?])
}

/// Where the storage of `tensor` lies: two tensors share it if these are equal.
pub(super) fn address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref::<Storage>(&storage).addr()
}

/// A custom operation's result.
pub(super) fn result(numbers: Vec<f32>, shape: &Shape) -> (CpuStorage, Shape) {
    (CpuStorage::F32(numbers), shape.clone())
}

/// Lends the numbers of `tensor` to `work`, to be changed in place.
pub(super) fn edit(tensor: &Tensor, work: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&Edit(Cell::new(Some(work))))
}

struct Edit<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for Edit<F> {
    fn name(&self) -> &'static str {
        "edit"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let range = contiguous(layout)?;
        let CpuStorage::F32(numbers) = storage else {
            bail!("in-place operation on a tensor that is not f32");
        };
        match self.0.take() {
            Some(work) => work(&mut numbers[range]),
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
    fn reading_follows_offsets_and_refuses_strides() -> Result<()> {
        let tensor = Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((3, 2))?;
        assert_eq!(&*floats(&tensor.narrow(0, 1, 1)?)?, &[2., 3.]);
        assert!(floats(&tensor.t()?).is_err());
        assert!(floats(&tensor.to_dtype(DType::F64)?).is_err());
        Ok(())
    }

    #[test]
    fn what_is_fixed_is_not_copied_unless_it_is_a_variable_or_of_another_type() -> Result<()> {
        let tensor = Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((3, 2))?;
        let fixed = Fixed::of(&tensor)?;
        assert_eq!(address(&fixed.0), address(&tensor));
        let variable = candle_core::Var::from_tensor(&tensor)?;
        let fixed = Fixed::of(&variable)?;
        variable.set(&tensor.zeros_like()?)?;
        assert_eq!(&*fixed.numbers(), &[0., 1., 2., 3., 4., 5.]);
        let half = Fixed::of(&tensor.to_dtype(DType::BF16)?.t()?)?;
        assert_eq!(&*half.numbers(), &[0., 2., 4., 1., 3., 5.]);
        Ok(())
    }

    #[test]
    fn editing_changes_the_numbers_in_place() -> Result<()> {
        let tensor = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
        edit(&tensor, |numbers| {
            numbers[1] = 7.;
            Ok(())
        })?;
        assert_eq!(tensor.to_vec1::<f32>()?, [0., 7., 0.]);
        Ok(())
    }
}
