//! The judges of the settings, on a bench, and the service over HTTP in front of it.

use std::sync::Arc;

use preference::{Bench, BenchSettings, JudgeError, Judges, Rebuild, Server, ServerParts};
use settings::{JudgeSettings, Settings};

/// A bench with the judge of the settings. It lives in the current runtime.
pub(crate) fn bench(settings: &Settings) -> anyhow::Result<Bench> {
    let judges = judges(settings)?;
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

/// The judge of the settings: replicas on threads of this process, or elsewhere.
pub(crate) fn judges(settings: &Settings) -> anyhow::Result<Judges> {
    match &settings.preference.judge {
        JudgeSettings::Http(chat) => Ok(Judges::chat(chat)?),
        JudgeSettings::Service { urls, token_path } => Ok(Judges::services(urls, token_path)?),
        _ => computing(settings),
    }
}

fn computing(settings: &Settings) -> anyhow::Result<Judges> {
    let replicas = (0..settings.preference.replicas)
        .map(|_| super::judge(settings))
        .collect::<anyhow::Result<_>>()?;
    let settings = settings.clone();
    let rebuild: Rebuild = Arc::new(move || {
        super::judge(&settings).map_err(|error| JudgeError::new(format!("{error:#}")))
    });
    Ok(Judges::computing(replicas, Some(&rebuild))?)
}

/// The service over HTTP in front of `bench`, where the settings say.
pub(crate) async fn server(settings: &Settings, bench: Bench) -> anyhow::Result<Server> {
    let parts = ServerParts {
        bench,
        orders: settings.preference.orders,
        texts: super::texts(settings)?,
        settings: settings.preference.http.clone(),
    };
    Ok(Server::bind(parts).await?)
}
