//! Log-probabilities under the mixture of a policy and its reference, from their final hidden states.

use candle_core::Tensor;

use crate::{error::ModelError, transformer::LanguageModel};

/// Tokens to score under the mixture `softmax((1 − m)·z_π + m·z_ref)`.
#[derive(Debug, Clone, Copy)]
pub struct MixtureInputs<'a> {
    /// The reference.
    pub reference: &'a LanguageModel,
    /// Final hidden state of the policy that predicts each token, `[R, hidden_size]`.
    pub hidden: &'a Tensor,
    /// Log-probability under the reference.
    pub ref_hidden: &'a Tensor,
    /// Weight m on the reference for each token.
    pub mixture_coefs: &'a [f32],
    /// Token ids.
    pub targets: &'a [u32],
}

impl LanguageModel {
    /// Log-probability of each token under the mixture of this policy and its reference, normalised per token (Munos et
    /// al. 2023): `[R]`, f32, in nats, without gradient.
    ///
    /// The mixture's logits are one product, `[(1 − m)·h_π, m·h_ref] · [W_π, W_ref]ᵀ`, so that they exist one tile at a
    /// time, as in [`Self::logprobs`]; with one head for both, `((1 − m)·h_π + m·h_ref) · Wᵀ`.
    ///
    /// # Errors
    /// If the shapes disagree or a token is unknown.
    pub fn mixture_logprobs(&self, inputs: &MixtureInputs<'_>) -> Result<Tensor, ModelError> {
        let rows = inputs.targets.len();
        let (hidden, ref_hidden) = (inputs.hidden.detach(), inputs.ref_hidden.detach());
        let m = Tensor::new(inputs.mixture_coefs, hidden.device())?
            .reshape((rows, 1))?
            .to_dtype(hidden.dtype())?;
        let of_policy = hidden.broadcast_mul(&m.affine(-1.0, 1.0)?)?;
        let of_reference = ref_hidden.broadcast_mul(&m)?;
        let (head, ref_head) = (&self.head, &inputs.reference.head);
        let scored = if head.is_same(ref_head) {
            self.token_logprobs(&(of_policy + of_reference)?, inputs.targets)?
        } else {
            let hidden = Tensor::cat(&[of_policy, of_reference], 1)?;
            let (head, ref_head) = (head.to_tensor()?, ref_head.to_tensor()?);
            let head = Tensor::cat(&[head.detach(), ref_head.detach()], 1)?;
            kernels::token_logprobs(&hidden, &head, inputs.targets, self.precision)?
        };
        Ok(scored.logp.detach())
    }
}
