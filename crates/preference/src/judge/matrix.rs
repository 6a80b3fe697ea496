//! The judge of a bandit: a table of which arm beats which, and how often.

use messages::{Completion, JudgeVersion, Probability};

use super::{Comparison, Judge, Verdict};
use crate::{JudgeError, PreferenceError};

/// How far p and 1 − p′ of an antisymmetric matrix may be apart: rounding of decimal fractions.
const TOLERANCE: f64 = 1e-6;

/// Looks the preference up: a completion is one token, the index of an arm.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    rows: Vec<Vec<Probability>>,
    antisymmetric: bool,
}

impl Matrix {
    /// The judge for which arm i beats arm j with probability `matrix[i][j]`.
    ///
    /// # Errors
    /// When there is no row, a row has not as many entries as there are rows, or an entry is not a
    /// probability.
    pub fn new(matrix: Vec<Vec<f64>>) -> Result<Self, PreferenceError> {
        let arms = matrix.len();
        let refuse = |reason| Err(PreferenceError::Matrix { reason });
        if arms == 0 {
            return refuse("it is empty; give one row for every arm".to_owned());
        }
        if let Some((i, row)) = matrix.iter().enumerate().find(|(_, row)| row.len() != arms) {
            return refuse(format!(
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

    /// The arm that a completion is, or why it is none.
    fn arm(&self, completion: &Completion) -> Result<usize, String> {
        let arms = self.rows.len();
        let [id] = completion.ids[..] else {
            let count = completion.ids.len();
            return Err(format!(
                "a completion of {count} tokens is no arm; an arm is one token"
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
    fn the_preference_is_looked_up_and_what_is_no_arm_is_not_judged() {
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
                abstained("a completion of 2 tokens is no arm; an arm is one token"),
            ),
            (
                &[0],
                &[],
                abstained("a completion of 0 tokens is no arm; an arm is one token"),
            ),
        ] {
            let comparison = Comparison {
                prompt: &prompt(),
                first: &completion("", first),
                second: &completion("", second),
            };
            let seen = matrix.judge(&[comparison]).unwrap();
            assert_eq!(seen, [expected], "{first:?} {second:?}");
        }
    }

    #[test]
    fn a_matrix_is_antisymmetric_when_both_orders_of_all_arms_add_up() {
        for (matrix, expected) in [
            (vec![vec![0.5, 0.7], vec![0.3, 0.5]], true),
            (vec![vec![0.5, 1.0], vec![0.5, 0.5]], false),
            (vec![vec![0.6]], false),
        ] {
            let seen = Matrix::new(matrix.clone()).unwrap().is_antisymmetric();
            assert_eq!(seen, expected, "{matrix:?}");
        }
    }

    #[test]
    fn what_is_no_matrix_of_probabilities_is_refused() {
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
                message.starts_with("use preference.judge.matrix: "),
                "{message}"
            );
        }
    }
}
