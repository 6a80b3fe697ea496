//! Preferences of a reward model between the playground's styles, whose true preferences are cyclic.

use messages::Seed;
use model::{RewardModel, Sequence};
use playground::{Style, held_out_post, held_out_seed, style_preference};
use serde::Serialize;

/// Number of posts on which the styles are compared.
const POSTS: u64 = 200;

/// Mean preference between two styles, on summaries that are otherwise equal.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StyleComparison {
    /// The style that the cyclic true preference prefers.
    pub(crate) style: &'static str,
    /// The style it is compared with.
    pub(crate) over: &'static str,
    /// Mean probability that the model prefers `style`.
    pub(crate) mean_p: f64,
    /// The true probability.
    pub(crate) gold: f64,
}

/// Compares the three pairs of styles of the cycle on golden summaries of held-out posts that differ only in style.
pub(crate) fn style_comparisons(
    model: &RewardModel,
    seed: Seed,
    cycle: f64,
) -> anyhow::Result<Vec<StyleComparison>> {
    let cycle_pairs = [
        (Style::Formal, Style::Plain),
        (Style::Playful, Style::Formal),
        (Style::Plain, Style::Playful),
    ];
    let mut sums = [0.0; 3];
    for index in 0..POSTS {
        let post = held_out_post(seed.0, index);
        let golden = post.golden(held_out_seed(seed.0, index));
        let prompt = post.prompt_ids();
        let in_style = |style: Style| [style.prefix(), &golden].concat();
        for (sum, (style, over)) in sums.iter_mut().zip(cycle_pairs) {
            let (first, second) = (in_style(style), in_style(over));
            let rows = model.rewards(&[&first, &second].map(|completion| Sequence {
                prompt: &prompt,
                completion,
            }))?;
            let rows: Vec<Vec<f32>> = rows.to_vec2()?;
            let p = model.config().kind.probability(&rows[0], &rows[1])?;
            *sum += f64::from(p.get());
        }
    }
    let comparisons = sums.into_iter().zip(cycle_pairs);
    let comparisons = comparisons.map(|(sum, (style, over))| StyleComparison {
        style: name(style),
        over: name(over),
        mean_p: sum / POSTS as f64,
        gold: style_preference(style, over, cycle),
    });
    Ok(comparisons.collect())
}

fn name(style: Style) -> &'static str {
    match style {
        Style::Plain => "plain",
        Style::Formal => "formal",
        Style::Playful => "playful",
    }
}
