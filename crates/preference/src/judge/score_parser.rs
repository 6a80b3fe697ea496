//! Parsing of a chat model's reply with a score: the last number in double brackets, as in `[[7]]`. Reasoning in
//! `<think>` tags is not part of the answer.

use settings::PointwiseSettings;

use crate::judge::verdict_parser::{answer, excerpt};

/// The score in `reply`, or why there is none: the last number in double brackets, from `min` to `max`.
pub(super) fn score(reply: &str, scale: &PointwiseSettings) -> Result<f64, String> {
    let numbers = answer(reply).rmatch_indices("[[").filter_map(|(start, _)| {
        let (inside, _) = answer(reply)[start + 2..].split_once("]]")?;
        inside.trim().parse::<f64>().ok()
    });
    let score = { numbers }.next();
    let score = score.ok_or_else(|| format!("no score in {:?}", excerpt(reply)))?;
    match (scale.min..=scale.max).contains(&score) {
        true => Ok(score),
        false => Err(format!(
            "the score {score} is not from {} to {}",
            scale.min, scale.max
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_in_double_brackets_is_the_score() {
        let scale = PointwiseSettings {
            template: String::new(),
            min: 1.0,
            max: 10.0,
            temperature: 1.0,
        };
        for (reply, expected) in [
            ("[[7]]", Ok(7.0)),
            ("Between [[2]] and [[8.5]]: [[ 3 ]] then.", Ok(3.0)),
            ("<think>[[9]]</think>\n[[4]]", Ok(4.0)),
            ("[[5]] as in [[this]]", Ok(5.0)),
            ("<think>[[9]]", Err("no score in \"<think>[[9]]\"")),
            ("[[]] 7 [8]", Err("no score in \"[[]] 7 [8]\"")),
            ("[[11]]", Err("the score 11 is not from 1 to 10")),
            ("[[NaN]]", Err("the score NaN is not from 1 to 10")),
        ] {
            let found = score(reply, &scale);
            assert_eq!(found, expected.map_err(str::to_owned), "{reply}");
        }
    }
}
