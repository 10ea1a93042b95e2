"""The deployer of hubs in tests where nothing is deployed."""


class NothingDeployed:
    def start(self, deployment, model, bundle, weights, columns, pretrained=None):
        raise AssertionError("nothing is deployed here")

    def stop(self, name):
        raise AssertionError("nothing is deployed here")

    def views(self):
        return ()

    def close(self):
        pass
