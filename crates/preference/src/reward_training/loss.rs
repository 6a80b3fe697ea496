//! Losses of a preference model: the term of annotated pairs and the term of golden answers.
//!
//! Both are functions of margins, the logit of p(first ≻ second) of every row; they do not know the model.

use model::{ModelError, Tensor};
use settings::ApoForm;

/// The mean over rows of `−p·log σ(d) − (1 − p)·log σ(−d)` = `softplus(d) − p·d` (Bradley & Terry 1952,
/// with soft labels). `margins` d `[R]`, `labels` p `[R]`; a scalar with gradient.
///
/// # Errors
/// When the shapes differ.
pub fn annotated(margins: &Tensor, labels: &[f32]) -> Result<Tensor, ModelError> {
    let labels = Tensor::new(labels, margins.device())?;
    Ok((softplus(margins)? - (labels * margins)?)?.mean_all()?)
}

/// The mean over rows of the golden answers' term (Cheng et al. 2311.08045), where d is the logit of
/// p(golden ≻ sample): `−log σ(d)`, or `−d` in the linear (Wasserstein) form. `margins` `[R]`; a scalar
/// with gradient. With the k samples of every golden answer as rows of equal weight, c times this is the paper's
/// `(c/k)·Σ`, averaged over golden answers.
///
/// # Errors
/// When a tensor operation fails.
pub fn golden(margins: &Tensor, form: ApoForm) -> Result<Tensor, ModelError> {
    let minus = margins.neg()?;
    Ok(match form {
        ApoForm::Ranking => softplus(&minus)?,
        ApoForm::Linear => minus,
    }
    .mean_all()?)
}

/// ln(1 + exp(x)) = max(x, 0) + ln(1 + exp(−|x|)), which does not overflow.
fn softplus(x: &Tensor) -> Result<Tensor, ModelError> {
    let small = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    Ok((x.relu()? + small)?)
}

#[cfg(test)]
mod tests {
    use model::Device;

    use super::*;

    fn margins(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn value(loss: Result<Tensor, ModelError>) -> f64 {
        f64::from(loss.unwrap().to_scalar::<f32>().unwrap())
    }

    #[test]
    fn hand_worked_values() {
        let ln2 = std::f64::consts::LN_2;
        let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
        let cases = [
            (value(annotated(&margins(&[0.0, 0.0]), &[1.0, 0.3])), ln2),
            (value(annotated(&margins(&[2.0]), &[1.0])), -sigma(2.0).ln()),
            (
                value(annotated(&margins(&[2.0]), &[0.25])),
                -0.25 * sigma(2.0).ln() - 0.75 * sigma(-2.0).ln(),
            ),
            (
                value(annotated(&margins(&[90.0, -90.0]), &[1.0, 1.0])),
                45.0,
            ),
            (
                value(golden(&margins(&[1.0, -1.0]), ApoForm::Ranking)),
                (-sigma(1.0).ln() - sigma(-1.0).ln()) / 2.0,
            ),
            (value(golden(&margins(&[1.0, -3.0]), ApoForm::Linear)), 1.0),
        ];
        for (case, (actual, expected)) in cases.into_iter().enumerate() {
            assert!(
                (actual - expected).abs() < 1e-5,
                "{case}: {actual} for {expected}"
            );
        }
    }

    /// Minimiser of annotated + a·golden for two responses, the golden one preferred by annotators with probability q,
    /// by bisection on the slope.
    fn optimum(a: f64, q: f32, form: ApoForm) -> f64 {
        let total = |d: f64| {
            let d = margins(&[d as f32]);
            value(annotated(&d, &[q])) + a * value(golden(&d, form))
        };
        let slope = |d: f64| (total(d + 0.05) - total(d - 0.05)) / 0.1;
        let (mut low, mut high) = (-4.0, 4.0);
        for _ in 0..40 {
            let middle = (low + high) / 2.0;
            if slope(middle) > 0.0 {
                high = middle;
            } else {
                low = middle;
            }
        }
        low
    }

    #[test]
    fn the_minimum_for_two_responses_matches_the_closed_form() {
        // σ(d*) = (a + b·q)/(a + b); the linear form σ(d*) = q + a/b; d* = logit q for a = 0.
        for (a, q, form, expected) in [
            (0.1, 0.7, ApoForm::Ranking, 0.980_829),
            (0.0, 0.7, ApoForm::Ranking, 0.847_298),
            (0.1, 0.7, ApoForm::Linear, 1.386_294),
            (0.5, 0.4, ApoForm::Ranking, 0.405_465),
        ] {
            let actual = optimum(a, q, form);
            assert!(
                (actual - expected).abs() < 4e-3,
                "a {a} q {q} {form:?}: {actual} for {expected}"
            );
        }
    }

    #[test]
    fn swapping_golden_and_sample_negates_the_slope() {
        for form in [ApoForm::Ranking, ApoForm::Linear] {
            let slope = |d: f32| {
                value(golden(&margins(&[d + 0.01]), form))
                    - value(golden(&margins(&[d - 0.01]), form))
            };
            // −σ(−d) and σ(d): equal and opposite at 0.
            let swapped =
                value(golden(&margins(&[-0.01]), form)) - value(golden(&margins(&[0.01]), form));
            assert!((slope(0.0) + swapped).abs() < 1e-6 && slope(0.0) < 0.0);
        }
    }
}
