//! What a preference model makes of the playground's styles, which beat one another in a circle.

use messages::Seed;
use model::{RewardModel, Sequence};
use playground::{Style, held_out_post, held_out_seed, style_preference};
use serde::Serialize;

/// Posts on which every two styles are compared.
const POSTS: u64 = 200;

/// One style against the one that it beats, on summaries that are otherwise the same.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StyleComparison {
    /// The style that people prefer where there is a cycle.
    pub(crate) style: &'static str,
    /// The other.
    pub(crate) over: &'static str,
    /// The mean p of the model.
    pub(crate) mean_p: f64,
    /// The true one.
    pub(crate) gold: f64,
}

/// The three comparisons of the cycle, over golden summaries of held-out posts that differ in style alone.
pub(crate) fn styles(
    model: &RewardModel,
    seed: Seed,
    cycle: f64,
) -> anyhow::Result<Vec<StyleComparison>> {
    let circle = [
        (Style::Formal, Style::Plain),
        (Style::Playful, Style::Formal),
        (Style::Plain, Style::Playful),
    ];
    let mut sums = [0.0; 3];
    for index in 0..POSTS {
        let post = held_out_post(seed.0, index);
        let golden = post.golden(held_out_seed(seed.0, index));
        let prompt = post.prompt_ids();
        let of = |style: Style| [style.prefix(), &golden].concat();
        for (sum, (style, over)) in sums.iter_mut().zip(circle) {
            let (first, second) = (of(style), of(over));
            let rows = model.score(&[&first, &second].map(|completion| Sequence {
                prompt: &prompt,
                completion,
            }))?;
            let rows: Vec<Vec<f32>> = rows.to_vec2()?;
            let p = model.config().kind.probability(&rows[0], &rows[1])?;
            *sum += f64::from(p.get());
        }
    }
    let comparison = |(sum, (style, over)): (f64, (Style, Style))| StyleComparison {
        style: name(style),
        over: name(over),
        mean_p: sum / POSTS as f64,
        gold: style_preference(style, over, cycle),
    };
    Ok(sums.into_iter().zip(circle).map(comparison).collect())
}

fn name(style: Style) -> &'static str {
    match style {
        Style::Plain => "plain",
        Style::Formal => "formal",
        Style::Playful => "playful",
    }
}
