//! State of a connection from the client's events: the current outage and the last permission error.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::{Event, ServerError};
use tokio::time::Instant;

/// State of one connection, shared with its event handler.
#[derive(Debug, Default)]
pub(crate) struct ConnectionHealth(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Since when the server is away.
    disconnected_since: Option<Instant>,
    /// Sum of the outages that have ended.
    past_outages: Duration,
    /// Number of refusals, and the last one.
    refusals: u64,
    last_refusal: String,
}

impl ConnectionHealth {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single assignment, so a poisoned value is consistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the connection is lost and not restored yet.
    pub(crate) fn is_disconnected(&self) -> bool {
        self.state().disconnected_since.is_some()
    }

    /// Time in which the server was away so far, in all outages together.
    pub(crate) fn outage_time(&self) -> Duration {
        let state = self.state();
        let current = state.disconnected_since.map(|since| since.elapsed());
        state.past_outages + current.unwrap_or_default()
    }

    /// Number of requests that the server has refused for want of a permission.
    pub(crate) fn refusals(&self) -> u64 {
        self.state().refusals
    }

    /// The last refusal, if there was one since there were `before`.
    pub(crate) fn refusal_since(&self, before: u64) -> Option<String> {
        let state = self.state();
        (state.refusals > before).then(|| state.last_refusal.clone())
    }

    /// Records and logs an event of the client.
    pub(crate) fn handle(&self, event: &Event) {
        match event {
            Event::Disconnected => {
                self.state()
                    .disconnected_since
                    .get_or_insert_with(Instant::now);
                tracing::warn!("the connection to the NATS server is lost; reconnecting");
            }
            Event::Connected => self.restored(),
            Event::ServerError(ServerError::Other(refusal)) if is_permission(refusal) => {
                let is_new = {
                    let mut state = self.state();
                    state.refusals += 1;
                    let is_new = state.last_refusal != *refusal;
                    state.last_refusal.clone_from(refusal);
                    is_new
                };
                if is_new {
                    tracing::error!(
                        refusal,
                        "the NATS server refuses a request of this process: grant its user the permissions that agon \
                         nats-config prints for its role"
                    );
                }
            }
            Event::ServerError(error) => {
                tracing::warn!(%error, "the NATS server reports an error");
            }
            other => tracing::debug!(%other, "event of the NATS client"),
        }
    }

    fn restored(&self) {
        let mut state = self.state();
        let Some(since) = state.disconnected_since.take() else {
            tracing::debug!("connected to the NATS server");
            return;
        };
        state.past_outages += since.elapsed();
        let seconds = since.elapsed().as_secs();
        tracing::info!(seconds, "connected to the NATS server again");
    }
}

fn is_permission(error: &str) -> bool {
    error.to_ascii_lowercase().contains("permissions violation")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn outages_last_from_disconnection_to_reconnection_and_add_up() {
        let health = ConnectionHealth::default();
        let pass = |seconds| tokio::time::advance(Duration::from_secs(seconds));
        let away = || (health.is_disconnected(), health.outage_time().as_secs());
        health.handle(&Event::Connected);
        pass(1).await;
        assert_eq!(away(), (false, 0));
        health.handle(&Event::Disconnected);
        pass(2).await;
        assert_eq!(away(), (true, 2));
        health.handle(&Event::Disconnected);
        pass(3).await;
        health.handle(&Event::Connected);
        pass(4).await;
        assert_eq!(away(), (false, 5));
        health.handle(&Event::Disconnected);
        pass(6).await;
        assert_eq!(away(), (true, 11));
    }

    #[test]
    fn a_refusal_is_known_to_requests_that_began_before_it() {
        let health = ConnectionHealth::default();
        let refusal = "Permissions Violation for Publish to \"x\"";
        let before = health.refusals();
        let other = ServerError::Other("Unknown Protocol Operation".into());
        health.handle(&Event::ServerError(other));
        assert_eq!(health.refusal_since(before), None);
        health.handle(&Event::ServerError(ServerError::Other(refusal.into())));
        assert_eq!(health.refusal_since(before).as_deref(), Some(refusal));
        assert_eq!(health.refusal_since(health.refusals()), None);
    }
}
