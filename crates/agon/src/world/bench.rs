//! The judges of the settings, on a bench, and the service over HTTP in front of it.

use std::sync::Arc;

use preference::{Bench, BenchSettings, JudgeError, Judges, Rebuild, Server, ServerParts};
use settings::{JudgeSettings, PreferenceSettings, Settings};

use super::JudgeSource;

/// A bench with this judge. It lives in the current runtime.
pub(crate) fn bench(settings: &Settings, judge: &Arc<JudgeSource>) -> anyhow::Result<Bench> {
    let judges = seats(&settings.preference, judge)?;
    Ok(Bench::new(
        judges,
        BenchSettings::from(&settings.preference),
    ))
}

/// A bench with the known gold preference of the world, where there is one.
pub(crate) fn gold_bench(settings: &Settings) -> anyhow::Result<Option<Bench>> {
    let Some(gold) = super::gold(settings) else {
        return Ok(None);
    };
    let judges = Judges {
        // Not to be mistaken for the judge itself, which may be the same.
        name: "gold-of-evaluations".into(),
        ..Judges::computing(vec![gold], None)?
    };
    let bench = BenchSettings::from(&settings.preference);
    Ok(Some(Bench::new(judges, bench)))
}

/// Replicas of this judge: on threads of this process, or elsewhere.
pub(crate) fn seats(
    settings: &PreferenceSettings,
    judge: &Arc<JudgeSource>,
) -> anyhow::Result<Judges> {
    match &settings.judge {
        JudgeSettings::Http(endpoints) => Ok(Judges::chat(endpoints, &settings.chat)?),
        JudgeSettings::Service { urls, token_path } => Ok(Judges::services(urls, token_path)?),
        _ => {
            let replicas = (0..settings.replicas).map(|_| judge.make());
            let replicas = replicas.collect::<anyhow::Result<_>>()?;
            let judge = Arc::clone(judge);
            let rebuild: Rebuild = Arc::new(move || {
                let judge = judge.make();
                judge.map_err(|error| JudgeError::new(format!("{error:#}")))
            });
            Ok(Judges::computing(replicas, Some(&rebuild))?)
        }
    }
}

/// The service over HTTP in front of `bench`, where the settings say.
pub(crate) async fn server(
    settings: &Settings,
    judge: &JudgeSource,
    bench: Bench,
) -> anyhow::Result<Server> {
    let parts = ServerParts {
        bench,
        orders: settings.preference.orders,
        texts: super::texts(settings, judge)?,
        settings: settings.preference.http.clone(),
    };
    Ok(Server::bind(parts).await?)
}
