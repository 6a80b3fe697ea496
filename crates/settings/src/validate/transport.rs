//! Where the roles meet, and the processes they are.

use super::Checks;
use crate::{JetStreamSettings, Settings, TransportSettings};

impl Checks {
    pub(super) fn transport(&mut self, settings: &Settings) {
        let name = &settings.run.name;
        let TransportSettings::Jetstream(jetstream) = &settings.transport else {
            self.directory(name);
            return;
        };
        self.server(jetstream);
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        self.require(
            !name.is_empty() && name.chars().all(plain),
            "run.name",
            format!("{name:?} must be of letters, digits, - and _: the server knows the run by it"),
        );
        let topology = &settings.topology;
        self.at_least(topology.restart_seconds, 1, "topology.restart_seconds");
        self.require(
            topology.preference <= 1 || settings.preference.apo.refresh_steps == 0,
            "topology.preference",
            "the adversarial game needs all its samples in one place: let it be 1",
        );
        self.require(
            topology.actors > 0 || !jetstream.url.is_empty(),
            "topology.actors",
            "without actors of its own the run needs a server that others find: set transport.url",
        );
    }

    /// The name of a run is that of a folder in `run.output_dir`, and of nothing outside it.
    fn directory(&mut self, name: &str) {
        let leads_out = |c: char| c == '/' || c == '\\' || c.is_control();
        let is_one = !name.trim().is_empty() && ![".", ".."].contains(&name);
        self.require(
            is_one && !name.contains(leads_out),
            "run.name",
            format!(
                "{name:?} must be the name of one folder in run.output_dir, without / and \\ and control characters: \
                 choose where it lies by run.output_dir"
            ),
        );
    }

    fn server(&mut self, jetstream: &JetStreamSettings) {
        self.at_least(jetstream.lease_seconds, 1, "transport.lease_seconds");
        self.at_least(jetstream.timeout_seconds, 1, "transport.timeout_seconds");
        self.at_least(
            u64::from(jetstream.max_deliveries),
            1,
            "transport.max_deliveries",
        );
        self.at_least(jetstream.full_every, 1, "transport.full_every");
        let replicas = jetstream.replicas;
        self.require(
            (1..=5).contains(&replicas),
            "transport.replicas",
            format!("{replicas} must be from 1 to 5"),
        );
        self.require(
            jetstream.certificate_path.as_os_str().is_empty()
                == jetstream.key_path.as_os_str().is_empty(),
            "transport.key_path",
            "certificate_path and key_path go together",
        );
    }
}
