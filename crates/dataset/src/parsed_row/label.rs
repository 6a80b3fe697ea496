//! The label of a pair: a probability, or the scores of both responses.

use crate::columns::{Column, LabelColumns};

/// The label of a pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PairLabel {
    /// Probability that the chosen response is preferred, in `[0, 1]`.
    Probability(f64),
    /// Scores of both responses, finite.
    Scores {
        /// Score of the chosen response.
        chosen: f64,
        /// Score of the rejected response.
        rejected: f64,
    },
}

impl PairLabel {
    /// Probability that the chosen response is preferred: σ((score − score′)/temperature) of scores, and at temperature
    /// 0 the side of the higher score, ½ for equal ones.
    #[must_use]
    pub fn probability(self, temperature: f64) -> f64 {
        let (chosen, rejected) = match self {
            Self::Probability(p) => return p,
            Self::Scores { chosen, rejected } => (chosen, rejected),
        };
        if temperature > 0.0 {
            return 1.0 / (1.0 + ((rejected - chosen) / temperature).exp());
        }
        match chosen.total_cmp(&rejected) {
            _ if chosen == rejected => 0.5,
            std::cmp::Ordering::Greater => 1.0,
            _ => 0.0,
        }
    }
}

/// The label in these columns, each read by `number`.
pub(super) fn label_of(
    columns: &LabelColumns,
    number: impl Fn(&Column) -> Result<f64, String>,
) -> Result<PairLabel, String> {
    match columns {
        LabelColumns::Probability(column) => {
            let p = number(column)?;
            match (0.0..=1.0).contains(&p) {
                true => Ok(PairLabel::Probability(p)),
                false => Err(format!(
                    "column {:?} is {p}, which is no probability: it is from 0 to 1{}",
                    column.name,
                    column.remedy()
                )),
            }
        }
        LabelColumns::Scores { chosen, rejected } => {
            let [chosen, rejected] = [chosen, rejected].map(number);
            let (chosen, rejected) = (chosen?, rejected?);
            Ok(PairLabel::Scores { chosen, rejected })
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::{columns::Columns, parsed_row::ParsedRow};

    #[test]
    fn scores_give_probabilities_by_hand() {
        let of = |chosen, rejected| PairLabel::Scores { chosen, rejected };
        // sigma(2) and sigma(-1) at the temperatures 1 and 2.
        for (label, temperature, expected) in [
            (of(3.0, 1.0), 1.0, 0.880_797_077_977_882_3),
            (of(1.0, 3.0), 2.0, 0.268_941_421_369_995_1),
            (of(1.0, 1.0), 1.0, 0.5),
            (of(3.0, 1.0), 0.0, 1.0),
            (of(1.0, 3.0), 0.0, 0.0),
            (of(0.0, -0.0), 0.0, 0.5),
            (of(1e308, -1e308), 1e-3, 1.0),
            (PairLabel::Probability(0.3), 0.0, 0.3),
        ] {
            let p = label.probability(temperature);
            assert!((p - expected).abs() < 1e-15, "{label:?}: {p}");
        }
    }

    fn read(row: Value, label: LabelColumns) -> Result<Option<PairLabel>, String> {
        let columns = Columns {
            label: Some(label),
            ..Columns::default()
        };
        let Value::Object(row) = row else {
            panic!("a row is an object")
        };
        let mut row: Map<String, Value> = row;
        for name in ["prompt", "chosen", "rejected"] {
            row.insert(name.into(), json!(name));
        }
        let parsed = ParsedRow::of(&row, &columns)?;
        assert_eq!(parsed.unread(), Vec::<&str>::new());
        parsed.label()
    }

    #[test]
    fn labels_outside_their_range_are_errors_that_name_column_and_setting() {
        let probability = || LabelColumns::Probability(Column::named("p", "pairs.label_column"));
        let scores = || LabelColumns::Scores {
            chosen: Column::named("s", "pairs.chosen_score_column"),
            rejected: Column::named("t", "pairs.rejected_score_column"),
        };
        let found = read(json!({"p": 0.25}), probability());
        assert_eq!(found, Ok(Some(PairLabel::Probability(0.25))));
        let found = read(json!({"p": 1}), probability());
        assert_eq!(found, Ok(Some(PairLabel::Probability(1.0))));
        let (chosen, rejected) = (3.0, -1.5);
        let found = read(json!({"s": 3, "t": -1.5}), scores());
        assert_eq!(found, Ok(Some(PairLabel::Scores { chosen, rejected })));
        for (row, columns, expected) in [
            (
                json!({"p": 1.5}),
                probability(),
                "column \"p\" is 1.5, which is no probability",
            ),
            (json!({"p": -0.1}), probability(), "set pairs.label_column"),
            (json!({"p": "high"}), probability(), "is not a number but"),
            (
                json!({"p": null}),
                probability(),
                "column \"p\" is null; set pairs.label_column",
            ),
            (json!({}), probability(), "there is no column \"p\""),
            (json!({"s": 3}), scores(), "there is no column \"t\""),
            (
                json!({"s": true, "t": 1}),
                scores(),
                "set pairs.chosen_score_column",
            ),
        ] {
            let error = read(row.clone(), columns).expect_err(expected);
            assert!(error.contains(expected), "{row}: {error}");
        }
    }
}
