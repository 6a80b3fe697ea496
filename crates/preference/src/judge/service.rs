//! Other Agon preference services as judges: each URL is a replica, asked in batches.
//!
//! The order of completions is taken care of here, by the bench that asks, so each question goes over
//! in one order. Messages, texts and token ids travel: a judge there reads the ids where they are its
//! own tokenizer's, and else renders the messages itself.

use std::path::Path;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use messages::{Dialogue, JudgeVersion};
use serde_json::json;
use settings::OrdersSetting;

use super::endpoint::Endpoint;
use crate::bench::{Answer, Judges, Question, Replica};
use crate::wire::{AskedPair, Preferences, PreferencesRequest, Ruled};
use crate::{Comparison, JudgeError, PreferenceError, Verdict};

/// Batches on their way to one address at a time: while one is judged there, others travel.
const BATCHES: usize = 4;

/// One service.
struct ServiceJudge {
    endpoint: Endpoint,
}

impl Judges {
    /// The preference services at these addresses, one replica each; with the bearer token in
    /// `token_path`, unless that is empty.
    ///
    /// # Errors
    /// When the token cannot be read or no client can be made.
    pub fn services(urls: &[String], token_path: &Path) -> Result<Self, PreferenceError> {
        let replica = |url: &String| {
            let endpoint = Endpoint::new(url, "/v1/preferences", token_path)?;
            Ok(Arc::new(ServiceJudge { endpoint }) as Arc<dyn Replica>)
        };
        Ok(Self {
            name: "service".into(),
            version: None,
            is_antisymmetric: false,
            replicas: urls
                .iter()
                .map(replica)
                .collect::<Result<_, PreferenceError>>()?,
        })
    }
}

impl ServiceJudge {
    async fn answers(&self, batch: &[Question]) -> Result<Vec<Answer>, JudgeError> {
        let request = PreferencesRequest {
            pairs: batch.iter().map(asked).collect(),
            orders: Some(OrdersSetting::One),
        };
        let preferences: Preferences = self.endpoint.post(&request).await?;
        let of_all = JudgeVersion(preferences.version);
        preferences
            .results
            .into_iter()
            .map(|ruled| answer(ruled, of_all))
            .collect()
    }
}

fn asked(question: &Question) -> AskedPair {
    let Comparison {
        prompt,
        first,
        second,
    } = question.comparison();
    let dialogue = prompt.dialogue.clone();
    let (asked, dialogue) = match dialogue {
        Some(dialogue) => (json!(dialogue.messages), dialogue),
        None => (prompt.text.as_str().into(), Dialogue::default()),
    };
    AskedPair {
        prompt: asked,
        tools: dialogue.tools,
        template_kwargs: dialogue.template_kwargs,
        answer: prompt.answer.clone(),
        first: first.text.clone(),
        second: second.text.clone(),
        first_finish: Some(first.finish.into()),
        second_finish: Some(second.finish.into()),
        prompt_ids: Some(prompt.ids.clone()),
        first_ids: Some(first.ids.clone()),
        second_ids: Some(second.ids.clone()),
    }
}

fn answer(ruled: Ruled, of_all: JudgeVersion) -> Result<Answer, JudgeError> {
    let version = ruled.version.map_or(of_all, JudgeVersion);
    let verdict = match (ruled.p, ruled.abstained) {
        (Some(p), None) => Verdict::from_probability(f64::from(p)),
        (None, Some(reason)) => Verdict::Abstained { reason },
        _ => {
            return Err(JudgeError::new(
                "a result must have either \"p\" or \"abstained\"",
            ));
        }
    };
    Ok(Answer::new(verdict, version))
}

impl Replica for ServiceJudge {
    fn name(&self) -> &str {
        self.endpoint.url()
    }

    fn concurrency(&self) -> usize {
        BATCHES
    }

    fn ask<'a>(&'a self, batch: &'a [Question]) -> BoxFuture<'a, Result<Vec<Answer>, JudgeError>> {
        Box::pin(self.answers(batch))
    }
}
