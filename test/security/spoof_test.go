package security_test

func spoofing(one world)    {}
func redirection(one world) {}
