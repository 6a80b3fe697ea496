//! Judge of a bandit: a matrix of preference probabilities between arms.

use messages::{Completion, JudgeVersion, Probability};

use crate::error::{JudgeError, PreferenceError};
use crate::judge::{Comparison, Judge, Verdict};

/// Tolerance of p + p′ = 1 in an antisymmetric matrix, for rounded decimal fractions.
const TOLERANCE: f64 = 1e-6;

/// Looks up the preference; a completion is one token, the index of an arm.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    rows: Vec<Vec<Probability>>,
    antisymmetric: bool,
}

impl Matrix {
    /// A judge that prefers arm i to arm j with probability `matrix[i][j]`.
    ///
    /// # Errors
    /// When the matrix is empty or not square, or an entry is not a probability.
    pub fn new(matrix: Vec<Vec<f64>>) -> Result<Self, PreferenceError> {
        let arms = matrix.len();
        let invalid = |reason| Err(PreferenceError::Matrix { reason });
        if arms == 0 {
            return invalid("it is empty; give one row for every arm".to_owned());
        }
        if let Some((i, row)) = matrix.iter().enumerate().find(|(_, row)| row.len() != arms) {
            return invalid(format!(
                "row {i} has {} entries and there are {arms} rows; give as many of both",
                row.len()
            ));
        }
        let antisymmetric = (0..arms)
            .all(|i| (0..=i).all(|j| (matrix[i][j] + matrix[j][i] - 1.0).abs() <= TOLERANCE));
        let rows = matrix
            .into_iter()
            .map(|row| row.into_iter().map(probability).collect())
            .collect::<Result<_, _>>()?;
        Ok(Self {
            rows,
            antisymmetric,
        })
    }

    fn verdict(&self, comparison: &Comparison<'_>) -> Result<Verdict, String> {
        let (i, j) = (self.arm(comparison.first)?, self.arm(comparison.second)?);
        Ok(Verdict::Preference(self.rows[i][j]))
    }

    /// Arm of a completion, or why there is none.
    fn arm(&self, completion: &Completion) -> Result<usize, String> {
        let arms = self.rows.len();
        let [id] = completion.ids[..] else {
            let count = completion.ids.len();
            return Err(format!(
                "a completion of {count} tokens is not an arm; an arm is one token"
            ));
        };
        let arm = id as usize;
        if arm < arms {
            Ok(arm)
        } else {
            Err(format!("there is no arm {arm}; the matrix has {arms}"))
        }
    }
}

fn probability(value: f64) -> Result<Probability, PreferenceError> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a probability needs no more than f32"
    )]
    Probability::new(value as f32).map_err(|error| PreferenceError::Matrix {
        reason: error.to_string(),
    })
}

impl Judge for Matrix {
    fn name(&self) -> &str {
        "matrix"
    }

    fn version(&self) -> JudgeVersion {
        JudgeVersion::default()
    }

    fn is_antisymmetric(&self) -> bool {
        self.antisymmetric
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        let verdict = |comparison| {
            self.verdict(comparison)
                .unwrap_or_else(|reason| Verdict::Abstained { reason })
        };
        Ok(batch.iter().map(verdict).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::fake::{abstained, completion, preferred, prompt};

    #[test]
    fn preferences_are_looked_up_and_invalid_arms_abstain() {
        let mut matrix = Matrix::new(vec![vec![0.5, 0.75], vec![0.25, 0.5]]).unwrap();
        assert!(matrix.is_antisymmetric());
        for (first, second, expected) in [
            (&[0][..], &[1][..], preferred(0.75)),
            (&[1], &[0], preferred(0.25)),
            (&[1], &[1], preferred(0.5)),
            (&[0], &[2], abstained("there is no arm 2; the matrix has 2")),
            (&[2], &[0], abstained("there is no arm 2; the matrix has 2")),
            (
                &[0, 1],
                &[0],
                abstained("a completion of 2 tokens is not an arm; an arm is one token"),
            ),
            (
                &[0],
                &[],
                abstained("a completion of 0 tokens is not an arm; an arm is one token"),
            ),
        ] {
            let comparison = Comparison {
                prompt: &prompt(),
                first: &completion("", first),
                second: &completion("", second),
            };
            let actual = matrix.judge(&[comparison]).unwrap();
            assert_eq!(actual, [expected], "{first:?} {second:?}");
        }
    }

    #[test]
    fn a_matrix_is_antisymmetric_when_both_orders_sum_to_one() {
        for (matrix, expected) in [
            (vec![vec![0.5, 0.7], vec![0.3, 0.5]], true),
            (vec![vec![0.5, 1.0], vec![0.5, 0.5]], false),
            (vec![vec![0.6]], false),
        ] {
            let actual = Matrix::new(matrix.clone()).unwrap().is_antisymmetric();
            assert_eq!(actual, expected, "{matrix:?}");
        }
    }

    #[test]
    fn invalid_matrices_are_rejected() {
        for (matrix, reason) in [
            (vec![], "it is empty"),
            (
                vec![vec![0.5], vec![0.5, 0.5]],
                "row 0 has 1 entries and there are 2 rows",
            ),
            (vec![vec![1.5]], "1.5 is not a probability"),
            (vec![vec![f64::NAN]], "NaN is not a probability"),
        ] {
            let message = Matrix::new(matrix).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
            assert!(
                message.starts_with("preference.judge.matrix: "),
                "{message}"
            );
        }
    }
}
