//! Remote Agon preference services as judges: each URL is a replica that accepts batches.
//!
//! The local pool handles both orders of a comparison, so every request has one order. Sends messages, texts and token
//! ids: the remote judge uses the ids if they are its own tokenizer's, and renders the messages otherwise.

use std::path::Path;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use messages::{Dialogue, JudgeVersion};
use serde_json::json;
use settings::OrdersSetting;

use crate::error::{JudgeError, PreferenceError};
use crate::judge::endpoint::{Endpoint, excerpt};
use crate::judge::identity::IdentityMonitor;
use crate::judge::{Comparison, Verdict};
use crate::pool::{ComparisonRequest, JudgeReplicas, Replica, VersionedVerdict};
use crate::wire::{ComparisonInput, PreferenceResult, Preferences, PreferencesRequest};

/// Concurrent batches per URL, to overlap network latency with judging.
const CONCURRENCY: usize = 4;

/// A remote service.
struct ServiceJudge {
    endpoint: Endpoint,
    identity: Arc<IdentityMonitor>,
}

impl JudgeReplicas {
    /// Preference services at these URLs, one replica each. Sends the bearer token in `token_path`, unless that path is
    /// empty.
    ///
    /// # Errors
    /// When the token cannot be read or a URL is not valid.
    pub fn services(urls: &[String], token_path: &Path) -> Result<Self, PreferenceError> {
        let identity = Arc::new(IdentityMonitor::new("service"));
        let replica = |url: &String| {
            let endpoint = Endpoint::new(url, "/v1/preferences", token_path)?;
            let identity = Arc::clone(&identity);
            Ok(Arc::new(ServiceJudge { endpoint, identity }) as Arc<dyn Replica>)
        };
        Ok(Self {
            name: "service".into(),
            version: None,
            is_antisymmetric: false,
            digest: None,
            replicas: urls
                .iter()
                .map(replica)
                .collect::<Result<_, PreferenceError>>()?,
        })
    }
}

impl ServiceJudge {
    async fn verdicts(
        &self,
        batch: &[ComparisonRequest],
    ) -> Result<Vec<VersionedVerdict>, JudgeError> {
        let request = PreferencesRequest {
            pairs: batch.iter().map(comparison_input).collect(),
            orders: Some(OrdersSetting::One),
        };
        let preferences: Preferences = self.endpoint.post(&request).await?;
        let default_version = JudgeVersion(preferences.version);
        // Without a preference the version may not be known.
        if preferences.results.iter().any(|result| result.p.is_some()) {
            let identity = identity(&preferences);
            self.identity.observe(self.endpoint.url(), identity);
        }
        preferences
            .results
            .into_iter()
            .map(|result| verdict(result, default_version))
            .collect()
    }
}

/// The judge behind a service: its name, its version, and the digest of what determines its verdicts.
fn identity(preferences: &Preferences) -> String {
    let judge = excerpt(preferences.judge.as_bytes());
    let version = preferences.version;
    match &preferences.digest {
        Some(digest) => format!(
            "judge {judge}, version {version}, digest {}",
            excerpt(digest.as_bytes())
        ),
        None => format!("judge {judge}, version {version}"),
    }
}

fn comparison_input(request: &ComparisonRequest) -> ComparisonInput {
    let Comparison {
        prompt,
        first,
        second,
    } = request.comparison();
    let dialogue = prompt.dialogue.clone();
    let (prompt_json, dialogue) = match dialogue {
        Some(dialogue) => (json!(dialogue.messages), dialogue),
        None => (prompt.text.as_str().into(), Dialogue::default()),
    };
    ComparisonInput {
        prompt: prompt_json,
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

fn verdict(
    result: PreferenceResult,
    default_version: JudgeVersion,
) -> Result<VersionedVerdict, JudgeError> {
    let version = result.version.map_or(default_version, JudgeVersion);
    let verdict = match (result.p, result.abstained) {
        (Some(p), None) => Verdict::from_probability(f64::from(p)),
        (None, Some(reason)) => Verdict::Abstained {
            reason: excerpt(reason.as_bytes()),
        },
        _ => {
            return Err(JudgeError::new(
                "a result must have either \"p\" or \"abstained\"",
            ));
        }
    };
    Ok(VersionedVerdict::new(verdict, version))
}

impl Replica for ServiceJudge {
    fn name(&self) -> &str {
        self.endpoint.url()
    }

    fn concurrency(&self) -> usize {
        CONCURRENCY
    }

    fn judge<'a>(
        &'a self,
        batch: &'a [ComparisonRequest],
    ) -> BoxFuture<'a, Result<Vec<VersionedVerdict>, JudgeError>> {
        Box::pin(self.verdicts(batch))
    }
}
