//! Draws the pairs of files into batches, labelled by the file or, once for each pair, by the run's judge.
//!
//! Promises that the pairs of a step are the next ones of the order that have a label, whatever the order in which labels
//! arrive, and that a pair is drawn again only in the next pass. Does not know the pairs from actors.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use messages::{
    DropReason, Dropped, JudgeVersion, Label, LabelledPair, Pair, Probability, PromptId,
};
use serde::{Deserialize, Serialize};
use telemetry::Waits;
use transport::Sender;

use crate::{
    error::LearnerError,
    file_pairs::{BatchShare, PairFiles, index_of},
    pair_selection::has_margin,
    progress_deadline::send_in_time,
};

/// Number of steps whose pairs are with the judge at once.
const STEPS_AHEAD: u64 = 2;

/// Inputs of a [`FilePairs`].
pub(crate) struct FilePairsParts {
    pub(crate) files: Arc<PairFiles>,
    pub(crate) share: BatchShare,
    /// Session of the learner.
    pub(crate) session: u64,
    /// Number of steps of the run.
    pub(crate) steps: u64,
    /// Judging of the pairs; `None`: the files have the labels.
    pub(crate) judging: Option<Judging>,
}

/// Way of the pairs of files to the judge.
pub(crate) struct Judging {
    /// Kind of the judge.
    pub(crate) name: &'static str,
    /// Outgoing pairs.
    pub(crate) pairs: Sender<Pair>,
    /// Longest wait for room in their stream.
    pub(crate) timeout: Duration,
    /// Registry of such waits.
    pub(crate) waits: Waits,
    /// Least |p − ½| of a label that is trained on.
    pub(crate) min_margin: f64,
}

/// Decision about a label that the judge gave to a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LabelArrival {
    /// The pair is trained on.
    Accepted,
    /// The pair is left out, in later passes too: its margin is too small.
    WithoutSignal,
    /// Not awaited.
    Duplicate,
}

/// State of a [`FilePairs`]; part of every checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FilePairsState {
    /// Number of the next pair in the order that was not trained on.
    cursor: u64,
    /// Number of pairs of the files.
    pub(crate) count: u64,
    /// Name of the judge of the verdicts.
    judge: String,
    /// The judge's verdicts by index of the pair.
    verdicts: BTreeMap<u64, JudgedLabel>,
}

/// The judge's label of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct JudgedLabel {
    /// Bits of p, so that they survive as text; `None` if the judge abstained or its margin is too small.
    p_bits: Option<u32>,
    /// Bits of the judge's own p, before penalties; absent in checkpoints of older builds.
    #[serde(default)]
    judged_bits: Option<u32>,
    version: JudgeVersion,
}

/// A pair that was drawn and not yet trained on.
struct Drawn {
    /// Number of the pair in the order.
    cursor: u64,
    pair: LabelledPair,
    label: LabelState,
}

/// Place of the label of a drawn pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LabelState {
    /// With the pair.
    Known,
    /// With the judge.
    Awaited,
    /// With the pair; its message came from the judge and counts as received.
    Received,
}

/// Pairs of one step from files.
#[derive(Default)]
pub(crate) struct FileBatch {
    pub(crate) pairs: Vec<LabelledPair>,
    /// Number of them that came from the judge in a message.
    pub(crate) received: u64,
}

/// The pairs of the files, in order.
pub(crate) struct FilePairs {
    parts: FilePairsParts,
    /// Number of the next pair to draw.
    cursor: u64,
    drawn: VecDeque<Drawn>,
    judge: String,
    /// Newest judge version among the verdicts; those of older ones are asked for again.
    newest: JudgeVersion,
    verdicts: BTreeMap<u64, JudgedLabel>,
}

impl JudgedLabel {
    fn of(label: Label, version: JudgeVersion) -> Self {
        let bits = |p: Probability| p.get().to_bits();
        Self {
            p_bits: Some(bits(label.p)),
            judged_bits: label.judged.map(bits),
            version,
        }
    }

    /// The label of the pair; without a p one half.
    fn label(self) -> Label {
        let p = |bits: u32| Probability::new(f32::from_bits(bits)).ok();
        Label {
            first: 0,
            second: 1,
            p: self.p_bits.and_then(p).unwrap_or(Probability::HALF),
            judged: self.judged_bits.and_then(p),
        }
    }
}

impl Drawn {
    /// Whether the label of this pair, in whichever pass it was asked for, is awaited.
    fn awaits(&self, id: PromptId) -> bool {
        self.label == LabelState::Awaited && index_of(self.pair.pair.id()) == index_of(id)
    }
}

impl FilePairs {
    pub(crate) fn new(parts: FilePairsParts) -> Self {
        Self {
            parts,
            cursor: 0,
            drawn: VecDeque::new(),
            judge: String::new(),
            newest: JudgeVersion::default(),
            verdicts: BTreeMap::new(),
        }
    }

    /// Split of the batches.
    pub(crate) fn share(&self) -> BatchShare {
        self.parts.share
    }

    /// State for a checkpoint. What is with the judge is asked for again.
    pub(crate) fn state(&self) -> FilePairsState {
        FilePairsState {
            cursor: self.drawn.front().map_or(self.cursor, |d| d.cursor),
            count: self.parts.files.count(),
            judge: self.judge.clone(),
            verdicts: self.verdicts.clone(),
        }
    }

    /// Restores the state of a checkpoint.
    pub(crate) fn restore(&mut self, state: FilePairsState) {
        let FilePairsState {
            cursor,
            count: _,
            judge,
            verdicts,
        } = state;
        self.newest = verdicts
            .values()
            .map(|v| v.version)
            .max()
            .unwrap_or_default();
        (self.cursor, self.judge, self.verdicts) = (cursor, judge, verdicts);
        self.drawn.clear();
    }

    /// Passes over the pairs that the pairs trained on make.
    pub(crate) fn passes(&self) -> f64 {
        let cursor = self.drawn.front().map_or(self.cursor, |d| d.cursor);
        cursor as f64 / self.parts.files.count().max(1) as f64
    }

    /// Number of pairs with the judge.
    pub(crate) fn awaited(&self) -> usize {
        let states = self.drawn.iter().map(|drawn| drawn.label);
        states.filter(|&label| label == LabelState::Awaited).count()
    }

    /// Number of drawn pairs that came from the judge in a message.
    pub(crate) fn received(&self) -> usize {
        let states = self.drawn.iter().map(|drawn| drawn.label);
        states
            .filter(|&label| label == LabelState::Received)
            .count()
    }

    /// Draws what step `step` needs, and with a judge what the next one does, which it is sent. Returns whether there is
    /// anything to draw: not once the judge has given none of the pairs a label. Cancel-safe: a pair that is being
    /// sent when this is cancelled is sent again after a resume.
    ///
    /// # Errors
    /// If the stream of pairs is closed or stays full.
    pub(crate) async fn refill(&mut self, step: u64) -> Result<bool, LearnerError> {
        let ahead = match self.parts.judging {
            Some(_) => STEPS_AHEAD,
            None => 1,
        };
        let end = (step + ahead).min(self.parts.steps);
        let wanted = self.parts.share.files_between(step, end);
        while self.drawn.len() < wanted {
            let Some(asked) = self.draw() else {
                // Of several files, some may have labels that these draws did not come to.
                return Ok(!self.has_no_labels());
            };
            if let (Some(pair), Some(judging)) = (asked, &self.parts.judging) {
                let _wait = judging.waits.enter("room for pairs");
                send_in_time(&judging.pairs, pair, "a pair", judging.timeout).await?;
            }
        }
        Ok(true)
    }

    /// The error of a judge that has given no pair a label; `dropped` are the reasons, as the end of a sentence.
    pub(crate) fn without_labels(&self, dropped: String) -> LearnerError {
        let judge = self.parts.judging.as_ref().map(|judging| judging.name);
        LearnerError::NoLabels {
            judge: judge.unwrap_or_default(),
            pairs: self.parts.files.count(),
            files: self.parts.files.paths(),
            dropped,
        }
    }

    /// Whether the newest judge has left every pair without a label.
    fn has_no_labels(&self) -> bool {
        let is_left_out =
            |verdict: &&JudgedLabel| verdict.version == self.newest && verdict.p_bits.is_none();
        self.verdicts.values().filter(is_left_out).count() as u64 == self.parts.files.count()
    }

    /// Draws the next pair; returns what is to be sent to the judge, if anything. `None` if as many draws as there are
    /// pairs came to pairs without a label alone.
    fn draw(&mut self) -> Option<Option<Pair>> {
        for _ in 0..self.parts.files.count() {
            let cursor = self.cursor;
            self.cursor += 1;
            let place = self.parts.files.place(cursor);
            let mut pair = self.parts.files.message(place, self.parts.session);
            let verdict = self.verdicts.get(&place.index);
            let verdict = verdict.filter(|verdict| verdict.version == self.newest);
            let label = match (&self.parts.judging, verdict) {
                (None, _) => LabelState::Known,
                (Some(_), None) => LabelState::Awaited,
                (Some(_), Some(JudgedLabel { p_bits: None, .. })) => continue,
                (Some(_), Some(&verdict)) => {
                    self.set_label(&mut pair, verdict.label(), verdict.version);
                    LabelState::Known
                }
            };
            // It may have been asked for in the pass before.
            let is_asked = self.drawn.iter().any(|drawn| drawn.awaits(pair.pair.id()));
            let asks = label == LabelState::Awaited && !is_asked;
            let asked = asks.then(|| pair.pair.clone());
            self.drawn.push_back(Drawn {
                cursor,
                pair,
                label,
            });
            return Some(asked);
        }
        None
    }

    fn set_label(&self, pair: &mut LabelledPair, label: Label, version: JudgeVersion) {
        pair.labels = vec![label];
        (pair.judge, pair.judge_version) = (self.judge.clone(), version);
    }

    /// Takes the judge's label of a pair, whose tokens are those that were sent.
    pub(crate) fn accept(&mut self, labelled: &LabelledPair) -> LabelArrival {
        let (id, version) = (labelled.pair.id(), labelled.judge_version);
        let Some(&label) = labelled.labels.first() else {
            return LabelArrival::Duplicate;
        };
        if !self.drawn.iter().any(|drawn| drawn.awaits(id)) {
            return LabelArrival::Duplicate;
        }
        self.judge.clone_from(&labelled.judge);
        self.newest = self.newest.max(version);
        let min_margin = self
            .parts
            .judging
            .as_ref()
            .map_or(0.0, |judging| judging.min_margin);
        if !has_margin(label.p, min_margin) {
            self.leave_out(id);
            return LabelArrival::WithoutSignal;
        }
        let judged = JudgedLabel::of(label, version);
        self.verdicts.insert(index_of(id), judged);
        let mut drawn = std::mem::take(&mut self.drawn);
        for drawn in drawn.iter_mut().filter(|drawn| drawn.awaits(id)) {
            self.set_label(&mut drawn.pair, judged.label(), version);
            drawn.label = match drawn.pair.pair.id() == id {
                true => LabelState::Received,
                false => LabelState::Known,
            };
        }
        self.drawn = drawn;
        LabelArrival::Accepted
    }

    /// Removes a pair that is awaited, and does not ask for it in later passes.
    fn leave_out(&mut self, id: PromptId) {
        let nothing = JudgedLabel {
            p_bits: None,
            judged_bits: None,
            version: self.newest,
        };
        self.verdicts.insert(index_of(id), nothing);
        self.discard(id);
    }

    /// Removes a pair that the judge has dropped, if it is awaited. If the judge abstained, it is not asked again.
    pub(crate) fn forget(&mut self, note: &Dropped) {
        let is_awaited = self.drawn.iter().any(|drawn| drawn.awaits(note.prompt));
        match is_awaited && note.reason == DropReason::Abstained {
            true => self.leave_out(note.prompt),
            false => self.discard(note.prompt),
        }
    }

    /// Removes a pair whose label does not come, if it is awaited.
    pub(crate) fn discard(&mut self, id: PromptId) {
        self.drawn.retain(|drawn| !drawn.awaits(id));
    }

    /// Whether the pairs of step `step` were drawn and are labelled.
    pub(crate) fn is_ready(&self, step: u64) -> bool {
        let count = self.parts.share.of_step(step);
        let first = self.drawn.iter().take(count);
        first.filter(|d| d.label != LabelState::Awaited).count() == count
    }

    /// Takes the pairs of step `step`, which are ready.
    pub(crate) fn take(&mut self, step: u64) -> FileBatch {
        let count = self.parts.share.of_step(step).min(self.drawn.len());
        let mut batch = FileBatch::default();
        for drawn in self.drawn.drain(..count) {
            batch.received += u64::from(drawn.label == LabelState::Received);
            batch.pairs.push(drawn.pair);
        }
        batch.pairs.sort_by_key(|labelled| labelled.pair.id());
        batch
    }
}
