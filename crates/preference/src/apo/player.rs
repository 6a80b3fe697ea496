//! A game, and the bench whose judge it makes.

use model::RewardModel;

use super::{Game, Outcome};
use crate::{Bench, Judges, PreferenceError};

/// Makes judges of a model, of the round that it is from.
pub type Seats = Box<dyn Fn(RewardModel, u64) -> Result<Judges, PreferenceError> + Send + Sync>;

/// The game as the service plays it.
pub struct Player {
    /// The game.
    pub game: Game,
    /// Makes judges of its models.
    pub seats: Seats,
}

impl Player {
    /// Waits for the end of the round that is being fitted and seats its model, unless it was refused; for
    /// ever, where no round is. Questions that were asked before are answered by the model before.
    pub(crate) async fn seated(
        player: &mut Option<Self>,
        bench: &Bench,
    ) -> Result<(), PreferenceError> {
        let Some(player) = player else {
            return std::future::pending().await;
        };
        let Outcome { report, model } = player.game.outcome().await?;
        if let Some(model) = model {
            bench.replace((player.seats)(model, report.round)?);
        }
        Ok(())
    }
}
